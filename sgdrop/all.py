"Everything a user needs, for `from sgdrop.all import *`; inside the package, names are imported one by one"
from sgdrop.attribution import *
from sgdrop.callback import *
from sgdrop.compare import *
from sgdrop.data import *
from sgdrop.dropout import *
from sgdrop.focus import *
from sgdrop.interpret import *
from sgdrop.mask import *
from sgdrop.monitor import *
from sgdrop.split import *
from sgdrop.teacher import *
