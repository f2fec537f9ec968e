from jaxtrain.config import Config


def get_config() -> Config:
    return Config(name="quickstart")
