"""What the scripts share, one concern a file.

startup     comes first: an old Python, a missing package, Ctrl-C, in one line
options     the options of every script: one list of keys, in six sections
packages    Python and the packages that must be installed; what one check found
notices     what a run's data and options mean for it, for warnings
preflight   all that a run needs, looked at before it starts: --check
config      reads them from YAML and flags; the only reader of configuration files
flags       the command line: parser, help, one-line errors, a flag for each option
model       loads SAM 3; device, precision, train and eval modes
forward     our forward over SAM 3's sub-modules: every layer, masks on demand
coco        reads, checks and writes COCO; polygons and RLE to and from masks
layout      where a split's files are, its JSON, and which format another folder is
faults      what can be wrong with a COCO file and its images
images      image files: size, pixels, which are refused
geometry    polygons, RLE and boxes as numbers: what is unusable, where they lie
repair      mends a split, into a copy
overview    a split as a whole: counts, faults, a contact sheet, its division
formats     readers of other annotation formats, into COCO records
shapes      what those readers find: shapes, classes, files, and their records
mask_images  reader of masks that are image files, into COCO records
tiles       large and crowded photos cut into tiles, and what is found in them merged
dataset     image x prompts -> targets, negatives, transforms
loader      items to batches: order, number of steps, worker processes, collate_fn
matching    which query learns which target, and the box arithmetic of the loss
losses      the criterion: a dict of named losses
metrics     box and mask AP, cgF1 and its factors, mask IoU
tables      figures as tables for a terminal; what a split lacks for some
memory      predicted peak GPU memory of training, the largest batch
processes   several processes of a run, as torchrun starts them; signals that end it
engine      the only batch loop: training, evaluation, schedule, seeding
features    the cache of frozen parts' features
evaluation  outputs to detections, a split to its metrics; a model ready to run
prediction  prompts on a photo: texts and boxes to detections; their routes over adapters
prompts     what a user asks on the command line: texts, boxes, routes, thresholds
video       frames: detections that keep an identity, overlays, a GIF
files       writing files: whole or not at all
checkpoint  the adapter file and the resume state
runlog      where a run stands; where its figures go: log, table, curves, TensorBoard, W&B
exchange    adapters in PEFT's format and with Meta's names, to and from ours
card        the model card of an export
scenes      drawn scenes: the demo task, and what the demo model knows
intervals   bootstrap over images, thresholds chosen on a split
report      the evidence: figures with intervals, on one HTML page
drawing     overlays, panels, curves
"""
