"""What all images share: process, files, data set, weights, figures. Edit it in model-train, then `make copies`."""

VERSION = "2.4.0"  # of the pipeline: records, labels of images, API and --version have it from here
