"""Capture -> decision: similarity, anchors, head maps, stability, cost. NumPy, SciPy and h5py only; never
torch.
"""
