"""What all images share: process, files, data set, weights, figures. Edit it in model-train, then `make copies`."""
