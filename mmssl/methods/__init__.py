"""One file for each paper."""

from mmssl.methods.barlow_twins import BarlowTwins
from mmssl.methods.byol import BYOL
from mmssl.methods.data2vec1 import Data2Vec1
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.methods.deepcluster import DeepCluster
from mmssl.methods.deepcluster_v2 import DeepClusterV2
from mmssl.methods.dino import DINO
from mmssl.methods.instance_discrimination import InstanceDiscrimination
from mmssl.methods.method import Method
from mmssl.methods.moco_v1 import MoCoV1
from mmssl.methods.moco_v2 import MoCoV2
from mmssl.methods.moco_v3 import MoCoV3
from mmssl.methods.sela_v2 import SeLaV2
from mmssl.methods.simclr import SimCLR
from mmssl.methods.simclr_v2 import SimCLRv2
from mmssl.methods.simsiam import SimSiam
from mmssl.methods.swav import SwAV
from mmssl.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    # joint embedding
    "simclr": SimCLR,
    "simclr_v2": SimCLRv2,
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "instance_discrimination": InstanceDiscrimination,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "deepcluster": DeepCluster,
    "deepcluster_v2": DeepClusterV2,
    "sela_v2": SeLaV2,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "dino": DINO,
    # masked
    "data2vec1": Data2Vec1,
    "data2vec2": Data2Vec2,
}

__all__ = ["METHODS", "Method"]
