"""One file for each paper."""

from mmssl.methods.aasae import AASAE
from mmssl.methods.anchor import Anchor
from mmssl.methods.barlow_twins import BarlowTwins
from mmssl.methods.beit import BEiT
from mmssl.methods.bind import Bind
from mmssl.methods.byol import BYOL
from mmssl.methods.cae import CAE
from mmssl.methods.causal_lm import CausalLM
from mmssl.methods.combined import Methods
from mmssl.methods.context_encoder import ContextEncoder
from mmssl.methods.cpc import CPC
from mmssl.methods.data2vec1 import Data2Vec1
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.methods.deepcluster import DeepCluster
from mmssl.methods.deepcluster_v2 import DeepClusterV2
from mmssl.methods.denoising_autoencoder import DenoisingAutoencoder
from mmssl.methods.dino import DINO
from mmssl.methods.electra import Electra
from mmssl.methods.gmml import GMML
from mmssl.methods.hubert import HuBERT
from mmssl.methods.ibot import IBOT
from mmssl.methods.igpt import IGPT
from mmssl.methods.ijepa import IJEPA
from mmssl.methods.instance_discrimination import InstanceDiscrimination
from mmssl.methods.mae import MAE
from mmssl.methods.method import Method
from mmssl.methods.mlm import MLM
from mmssl.methods.moco_v1 import MoCoV1
from mmssl.methods.moco_v2 import MoCoV2
from mmssl.methods.moco_v3 import MoCoV3
from mmssl.methods.mp3 import MP3
from mmssl.methods.msn import MSN
from mmssl.methods.sela_v2 import SeLaV2
from mmssl.methods.simclr import SimCLR
from mmssl.methods.simclr_v2 import SimCLRv2
from mmssl.methods.simmim import SimMIM
from mmssl.methods.simsiam import SimSiam
from mmssl.methods.sit import SiT
from mmssl.methods.splitmask import SplitMask
from mmssl.methods.swav import SwAV
from mmssl.methods.tera import TERA
from mmssl.methods.vicreg import VICReg
from mmssl.methods.wav2vec2 import Wav2Vec2

PAPERS: dict[str, type[Method]] = {
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
    "bind": Bind,
    # beside another method
    "anchor": Anchor,
    # masked: what a teacher makes of the whole
    "data2vec1": Data2Vec1,
    "data2vec2": Data2Vec2,
    "ibot": IBOT,
    "msn": MSN,
    "ijepa": IJEPA,
    # masked: raw values
    "mae": MAE,
    "simmim": SimMIM,
    "gmml": GMML,
    "sit": SiT,
    "denoising_autoencoder": DenoisingAutoencoder,
    "context_encoder": ContextEncoder,
    "aasae": AASAE,
    "tera": TERA,
    # masked: codes, units, ids
    "beit": BEiT,
    "cae": CAE,
    "splitmask": SplitMask,
    "wav2vec2": Wav2Vec2,
    "hubert": HuBERT,
    "mlm": MLM,
    "electra": Electra,
    # predictive
    "causal_lm": CausalLM,
    "cpc": CPC,
    "igpt": IGPT,
    "mp3": MP3,
}
METHODS = Methods(PAPERS)

__all__ = ["METHODS", "Method"]
