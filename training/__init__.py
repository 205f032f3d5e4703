"""Training, converting and evaluating Cinnabar's models. See training/README.md."""
