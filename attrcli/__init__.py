"""attrcli: explain saved models (TorchScript, ONNX, .pt2) from the command line, or from Python in three lines."""

__version__ = "0.1.0"
