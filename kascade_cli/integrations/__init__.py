"""The engines that sparse attention runs in."""
