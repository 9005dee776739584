"""What runs a network: models opened as a `Predictor`. A new backend is a file and a line in
`opening.BACKENDS`.
"""
