"""Model folders that others can load."""

FORMATS = ("auto", "hf", "remote-code", "onnx", "timm", "heads")  # of an export
