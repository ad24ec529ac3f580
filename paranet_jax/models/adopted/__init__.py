"""Trained PyTorch networks with early exits: architectures under PyTorch's names, one short file per group.

To add an architecture:
1. Write a file here (see `cifar_resnet.py`) with a function from a name to an `Architecture`, and list the name with
   this function in `registry.py`. Another package registers it by `register_architecture`, or as an entry point.
2. `build(num_classes)` returns the stages in order, each a place and a function from features and `Mode` to features,
   and the classifier, a function from the last features to logits. They create the modules of `layers.py`, or their
   own, inside the network, so nothing is created before it runs.
3. A place is PyTorch's name of the module that a stage ends with ('layer2.1'); `layer2` then means its last stage.
4. Name modules as in PyTorch, with dots where they nest ('layer1.0', within it 'conv1' or 'shortcut.0'): then a state
   dict maps by one rule (see `tensors.py`). A parameter that is no kernel, scale or bias keeps PyTorch's name and
   shape: `self.param('cls_token', token_init, (1, 1, width))`.
5. Files that name the same tensors otherwise are read through `renames`.
6. Commit PyTorch's logits for weights drawn by NumPy, and test parameters and multiply-adds against published counts.
"""
