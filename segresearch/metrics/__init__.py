"""Metrics of images and of sets of images, with the networks that they need (docs/metrics.md).

features           networks that turn images into features, by name
frechet            Fréchet distance of features, with its errors
mmd                kernel distances of features: KID, CMMD
precision          precision and recall of features
text_alignment     agreement of images with their prompts
lpips              LPIPS of pairs of images
edge_agreement     agreement of images with the edges of their control images
attributes         the attribute classifier of `mini`: agreement of images with their scenes
mini_vision        the vision tower of `mini`: features, and a perceptual distance
inception          Inception-v3 of the Fréchet inception distance
weight_files       published weights: where they lie, and their checksums
"""
