"""The run of ccnet3d_T5_R_18_D8_half.py on single frames: as many labelled frames an iteration, and iterations."""

from .ccnet3d_T5_R_18_D8_half import dataloader, lr_multiplier, model, optimizer, test, train

dataloader.train.dataset.length = 1
dataloader.train.total_batch_size = 10
