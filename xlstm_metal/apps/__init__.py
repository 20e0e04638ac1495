"""What people run: the command line, mlx-lm's tools, the server and the playground."""
