import sys

if sys.platform == "win32":  # which has neither its locks of folders nor its signals
    raise ImportError("the pipeline does not run on Windows itself, but in WSL: `wsl --install`.")
