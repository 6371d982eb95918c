"""Learning-rate schedules, relative to the optimizer's lr and to train.max_iter."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from ccnet_d2.engine.schedule import PolynomialDecayToMinimum

poly = L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9)

# mmsegmentation's: the same down to a learning rate of 1e-4.
poly_to_minimum = L(PolynomialDecayToMinimum)(base_lr="${optimizer.lr}", min_lr=1e-4, power=0.9)
