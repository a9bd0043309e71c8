"The names that most users need; import all others from their modules"
from sgdrop.attribution import attribute, captum_attribution, random_attribution
from sgdrop.callback import SGDropCallback
from sgdrop.data import few_per_class, flowers17, imagenette, shortcut_digits
from sgdrop.dropout import SGDrop
from sgdrop.interpret import AttributionInterpretation, total_variation
from sgdrop.mask import SaliencyWarning, kept_attribution, saliency_mask
from sgdrop.metrics import (
    attributed, attribution_ratio, curve_auc, deletion_curve, effective_area, gini,
    insertion_curve, model_attribution, neuron_coverage, occlusion_accuracy,
    pointing_game, region_iou, relevance_mass)
from sgdrop.monitor import (
    LeakWarning, MaskMonitor, NoEffectWarning, NotFiniteWarning, StarvationWarning,
    diagnose)
from sgdrop.plots import plot_attribution_history, plot_focus, show_attribution
from sgdrop.recorder import FocusRecorder
from sgdrop.split import feature_maps, find_layer, split_model
from sgdrop.stats import format_difference, paired_difference, paired_table
from sgdrop.teacher import EMATeacher
