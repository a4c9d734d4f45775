"""What compression costs in quality: the tasks of `razor-local eval`, policies side by side."""
