"""Measure the attention kernels: single ops, the roles of a layer, and whole models."""
