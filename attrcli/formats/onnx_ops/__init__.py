"""What ONNX ops mean: one small function per op, by family, and the walk that applies them."""
