"""The same network with the recipe of CE2P's newer code: 384x384, rotation, 150 epochs of batches of 96.

The whole image is fitted into the crop, scaled by a quarter either way and rotated by up to 60 degrees; it is tested
fitted into the crop as well, without the padding.
"""

from detectron2.config import LazyCall as L

from ccnet_d2.data.transforms import RandomRotateFit, ResizeToFit

from .ce2p_ccl_R_101_D16_473x473_115k import dataloader, lr_multiplier, model, optimizer, test, train

dataloader.train.mapper.augmentations[0] = L(RandomRotateFit)(
    crop_size=[384, 384], scale_std=0.25, angle_std=30.0, angle_probability=0.6
)
dataloader.train.total_batch_size = 96
dataloader.test.mapper.augmentations = [L(ResizeToFit)(long_side=384, short_side=384)]
optimizer.lr = 1e-3
train.max_iter = 47600
