"""Datasets of robot episodes: reading (LeRobot, RLDS, HDF5, torch), checking, statistics, augmentation, streaming."""
