"""CCNet as in the official code, which takes images in BGR, less a mean and not divided."""

from .ccnet import model

model.pixel_mean = [104.00698793, 116.66876762, 122.67891434]
model.pixel_std = [1.0, 1.0, 1.0]
model.input_format = "BGR"
