"""Control images of ControlNets: images of any kind, their edges and their depth, or exact maps of scenes.

    image = canny(fit(open_image("photo.jpg"), (1024, 1024)))         # (1, 3, 1024, 1024) in [0, 1]
"""
