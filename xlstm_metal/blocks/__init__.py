"Modules between norms and residual connections, by kind."
from . import discovery as _discovery  # registers the kinds that come with the package
