"""How a run is tested; import one as `test`.

`test.inference` is a mode of `ccnet_d2.inference` or the name of one, so an override chooses another:
`test.inference=slide` (tiles of 769), `=ms` (six scales, each also mirrored) or `=ms-slide` (both).
"""

from detectron2.config import LazyCall as L

from ccnet_d2.inference import MultiScaleFlip, SlidingWindow

whole = dict(inference="whole")

# Tiles that overlap by a third: 2 x 4 on 1024x2048.
slide = dict(inference=L(SlidingWindow)(tile=769, stride=513))

# The image and its mirror image; classes that a mirror swaps are those of the data set.
mirror = dict(inference=L(MultiScaleFlip)(scales=[1.0]))

# RANet's six scales; its paper speaks of no mirror images.
six_scales = dict(inference=L(MultiScaleFlip)(scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=False))
