"""The HTML page and the model card of a build, and the plots of its dataset."""
