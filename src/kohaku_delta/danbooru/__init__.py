"""The published data: the danbooru2023 database, its tars and the images in them."""
