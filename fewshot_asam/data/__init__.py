"""Datasets: one file each, all of one type, resident on the device."""
