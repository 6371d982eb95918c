"""Learning-rate schedules, relative to the optimizer's lr and to train.max_iter."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

poly = L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9)
