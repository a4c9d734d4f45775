"""Leave out the windows and notebooks in which tqdm can show its bars."""

excludedimports = ["matplotlib", "IPython", "ipywidgets", "pandas", "tkinter"]
