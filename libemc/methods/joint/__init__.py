"""What all images of a tilt series' particles say together: corrections of each, held by what neighbours have in common."""
