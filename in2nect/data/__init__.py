"""Data: classes, folder data sets read by the window, training crops, evaluation grids, synthetic scenes."""
