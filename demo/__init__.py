"""The page that solves in a browser, and the export of a model to ONNX that it runs."""
