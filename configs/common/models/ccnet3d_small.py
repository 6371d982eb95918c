"""CCNet3D on a ResNet-18 with the basic stem and a narrow head, for small machines and images."""

from detectron2.config import LazyCall as L

from ccnet_d2.modeling import CCNet3D

from .ccnet_small import model as frame_model

model = L(CCNet3D)(**{key: value for key, value in frame_model.items() if key != "_target_"})
model.sem_seg_head.context = "rcca3d"
