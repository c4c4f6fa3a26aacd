"""Our models in PyTorch: `bench` times them beside ours, and `verify` compares the two.

All modules of this package need torch.
"""
