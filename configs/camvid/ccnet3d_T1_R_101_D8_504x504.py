"""The run of ccnet3d_T5_R_101_D8_504x504.py on single frames: "CCNet3D (T=1)" of the paper's Tab. 9."""

from .ccnet3d_T5_R_101_D8_504x504 import dataloader, lr_multiplier, model, optimizer, test, train

dataloader.train.dataset.length = 1
