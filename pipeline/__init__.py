import sys

if sys.platform == "win32":  # lacks the folder locks and signals used here
    raise ImportError("the pipeline does not run on Windows itself, but in WSL: `wsl --install`.")
