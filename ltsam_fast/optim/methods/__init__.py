"""The methods, one file each: docstring, options, rule."""
