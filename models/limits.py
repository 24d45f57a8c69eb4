"""The most that a file of somebody else's may ask for; what is larger is refused with a sentence."""

CLASSES = 100_000
IMAGES_BYTES = 2**33  # of a data set that is held in memory
VALUES = 10**6  # plain values and tensors in a checkpoint, each as often as it is named
DEPTH = 100  # of values within values
COPIES = 1000  # of parts of a pickle that it makes
PARTS = 1000  # of what it copies
NUMBERS = 20_000  # that are keys, in a pickle: of many more, so many collide that reading takes minutes
DIMENSIONS = 16  # of a tensor
LINE = 2**16  # letters of a line of metrics.csv
CELLS = 2**25  # values of a metrics.csv, of eight letters each; a line takes as much as four more
SETTINGS = 2**14  # letters of config.yaml
EPOCHS = 10**6  # of a run
OPERATIONS = 4 * VALUES  # of a pickle
REPORT = 2**24  # bytes of a conversion's report.json, or a study's report.md
UNPACKED = 4  # what a file of weights holds, over its own size
HEADER = 2**24  # letters of JSON in a file of weights
IMAGE_BYTES = 2**30  # of one image file, which some readers take whole
IMAGE_SIZE = 2048  # side of a network's images, in pixels
IMAGE_PIXELS = 2**26  # of one image file: 8,192 x 8,192, say; of some formats each takes 24 bytes
PPM_PIXELS = 2**24  # whose reader may take two microseconds each
TILE = 1024  # side of a part of a TIFF; it may be larger if the image is half as large
IMAGE_SIDES = 256  # longer side over shorter side of one image file
PARAMETERS = 1.5  # of the network that a file names, over those that it holds
