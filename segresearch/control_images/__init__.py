"""Control images of ControlNets: images of any kind, their edges and their depth, or exact maps of scenes."""
