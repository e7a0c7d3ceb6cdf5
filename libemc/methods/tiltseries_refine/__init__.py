"""The tilt series refined by its particles: what their images say of the microscope and the stage, once their poses are known."""
