"`python -m xlstm_metal`: the same as the command `xlstm-metal`."
from xlstm_metal.apps.cli import main

if __name__ == "__main__": raise SystemExit(main())
