"""Leave out the GUI and notebook packages in which tqdm can show its bars."""

excludedimports = ["matplotlib", "IPython", "ipywidgets", "pandas", "tkinter"]
