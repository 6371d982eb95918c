"""How a run is tested; import one as `test`.

`test.inference` is a mode of `ccnet_d2.inference` or the name of one, so an override chooses another:
`test.inference=slide` (tiles of 769), `=ms` (six scales, each also mirrored) or `=ms-slide` (both).
"""

from detectron2.config import LazyCall as L

from ccnet_d2.inference import SlidingWindow

whole = dict(inference="whole")

# Tiles that overlap by a third: 2 x 4 on 1024x2048.
slide = dict(inference=L(SlidingWindow)(tile=769, stride=513))
