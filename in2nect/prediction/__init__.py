"""Prediction of whole scenes."""

from in2nect.prediction.scene import predict_raster

__all__ = ["predict_raster"]
