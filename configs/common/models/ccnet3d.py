"""CCNet3D: CCNet on every frame of a clip, with three loops of criss-cross attention over time, height and width."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import CCNet3D

from .ccnet import model as frame_model

model = L(CCNet3D)(**{key: value for key, value in frame_model.items() if key != "_target_"})
model.sem_seg_head.context = "rcca3d"
