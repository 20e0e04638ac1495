# A fresh export must change nothing: neither package, kernels and README nor the notebooks themselves.
set -eu
state() { find xlstm_metal kernels nbs README.md -type f ! -path '*/__pycache__/*' ! -path '*/.ipynb_checkpoints/*' ! -name .last_checked | LC_ALL=C sort | xargs cksum; }
mkdir -p build
state > build/before
make -s export
state > build/after
diff build/before build/after || { echo 'These files were not what the notebooks export: run make export and commit.'; exit 1; }
