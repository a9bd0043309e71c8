"The callback of version 0.1 (commit a71223c) and today's: equal weights, to the bit. Run in a clone: python tests/old_and_new.py [CASE…]"
import io, random, subprocess, sys, tarfile, tempfile, warnings
from pathlib import Path
warnings.simplefilter('ignore')
folder = Path(tempfile.mkdtemp())
archive = subprocess.run(['git', 'archive', 'a71223c', 'sgdrop'], capture_output=True, check=True).stdout
tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder)
(folder / 'sgdrop').rename(folder / 'oldsgdrop')
sys.path[:0] = [str(folder), str(Path(__file__).parent)]
import torch
from functools import partial
from fastai.callback.core import CancelFitException
from fastai.data.core import TfmdDL
import tempfile, pathlib
import torch.nn.functional as F
from torch import nn
import oldsgdrop.callback as old, oldsgdrop.teacher as ot
import sgdrop.callback as new, sgdrop.teacher as nt
ot.fast_dtype = nt.fast_dtype = lambda d: torch.float32
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.callback.schedule import Learner, SchedLin
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from networks import small_network, images, Autocast, Compares
OLD=dict(p='share', clean_weight='unmasked')
def learner(net, cbs=(), n=48, size=8, **kw):
    x=images(n,size); y=torch.randint(4,(n,),generator=torch.Generator().manual_seed(1))
    items=list(zip(x,y)); torch.manual_seed(0); random.seed(0)
    dls=DataLoaders.from_dsets(items, items[:16], bs=8, device='cpu', num_workers=0)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.05, cbs=list(cbs))
class Penalty(Callback):
    order=20
    def __init__(self, order=0): self.order=order
    def after_loss(self): self.learn.loss_grad = self.loss_grad + 0.1*sum(p.square().sum() for p in self.model.parameters()); self.learn.loss=self.loss_grad.clone()
class ValidatesWithin(Callback):
    run_valid=False
    def after_batch(self):
        if self.train_iter==2 and not getattr(self,'done',0): self.done=1; e=self.learn.epoch; self.learn.validate(); self.model.train()
class Uncut(nn.Module):
    def __init__(self):
        super().__init__(); self.stem, self.a, self.b = nn.Conv2d(3,8,3,padding=1), nn.Conv2d(8,8,3,padding=1), nn.Conv2d(8,8,3,padding=1)
        self.bn=nn.BatchNorm2d(8); self.fc=nn.Linear(8,4)
    def forward(self,x):
        s=self.stem(x); h=self.bn(self.b(torch.relu(self.a(s)))) + s
        return self.fc(torch.relu(h).mean((2,3)))
class Twice(nn.Module):
    def __init__(self): super().__init__(); self.c=nn.Conv2d(3,8,3,padding=1); self.again=nn.Conv2d(8,8,3,padding=1); self.fc=nn.Linear(8,4)
    def forward(self,x): return self.fc(torch.relu(self.again(torch.relu(self.again(self.c(x))))).mean((2,3)))
CASES={
 'defaults': {}, 'two layers': dict(layer=['0','1']), 'early layer': dict(layer='0'), 'early layer, p .5': dict(layer='0',p=.5), 'p below 1': dict(p=.5),
 'accumulation': dict(_cbs=lambda:[GradientAccumulation(16)]), 'bfloat16': dict(_cbs=lambda:[Autocast()]), 'MixUp, labels': dict(target='label',_cbs=lambda:[MixUp(.5)]),
 'CutMix, labels':dict(target='label',_cbs=lambda:[CutMix(.5)]),
 'label': dict(target='label'), 'head teacher': dict(teacher='head'), 'full teacher': dict(teacher='full'), 'full teacher, bfloat16': dict(teacher='full',_cbs=lambda:[Autocast()]),
 'late start': dict(start=.5), 'late start, full teacher': dict(start=.5,teacher='full'), 'ends early': dict(end=.5), 'schedule': dict(rho=SchedLin(.1,.8)),
 'validation within': dict(_cbs=lambda:[ValidatesWithin()]), 'validation within, full teacher': dict(teacher='full',_cbs=lambda:[ValidatesWithin()]),
 'penalty early': dict(_cbs=lambda:[Penalty(0)]), 'penalty late': dict(_cbs=lambda:[Penalty(20)]), 'clean_weight 0': dict(clean_weight=0.), 'element, zero': dict(granularity='element',fill='zero'), 'channel': dict(granularity='channel', fill='mean'), 'gradcam':dict(attribution='gradcam'),
 'uncut': dict(_net=Uncut, layer='a'), 'uncut, full teacher': dict(_net=Uncut, layer='a', teacher='full'), 'runs twice': dict(_net=Twice, layer='again'),
 'compiled': dict(_net=lambda: torch.compile(small_network(), backend='eager')),
}
def weights(module, case, epochs=2):
    case=dict(case); net=case.pop('_net',small_network); cbs=case.pop('_cbs',lambda:[])
    torch.manual_seed(0); net=net()
    if module is old: case={OLD.get(k,k):v for k,v in case.items()}
    learn=learner(net); cb=module.SGDropCallback(**({'rho':.3}|case)) if module else None
    torch.manual_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=cbs()+([cb] if cb else []))
    return net.state_dict(), cb
if __name__=='__main__':
    for name in sys.argv[1:] or CASES:
        a,_=weights(old,CASES[name]); b,cb=weights(new,CASES[name]); c,_=weights(None,{k:v for k,v in CASES[name].items() if k[0]=='_'})
        gap=max((a[k].float()-b[k].float()).abs().max().item() for k in a); plain=max((a[k].float()-c[k].float()).abs().max().item() for k in a)
        h=[{k:round(v,3) for k,v in r.items()} for r in (cb.history)][-1:]
        print(f'{name:32} {gap:.3g}  (plain differs by {plain:.2g})', h)
    # resuming: two epochs and two more, against four of the old one
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: raise CancelFitException
    def L(net):
        items=list(zip(images(32,8), torch.arange(32)%4))
        return Learner(DataLoaders(TfmdDL(items,bs=8,num_workers=0),TfmdDL(items[:8],bs=8,num_workers=0),device='cpu'), net, loss_func=CrossEntropyLossFlat())
    def net0():
        torch.manual_seed(0); return nn.Sequential(*[m for m in small_network() if not isinstance(m, nn.Dropout)])
    def fit(l,*cbs,**k):
        with l.no_bar(),l.no_logging(): l.fit_one_cycle(4,1e-2,cbs=list(cbs),**k)
        return l
    S=dict(rho=.3,teacher='full'); 
    torch.manual_seed(3); whole=fit(L(net0()), old.SGDropCallback(**S,share=.5,unmasked=.3))
    torch.manual_seed(3); cb=new.SGDropCallback(**S,p=.5,clean_weight=.3); half=fit(L(net0()),cb,Stop()); state=cb.state_dict()
    with tempfile.TemporaryDirectory() as d:
        half.save(pathlib.Path(d)/'h'); rest=L(net0()); rest.load(pathlib.Path(d)/'h'); cb=new.SGDropCallback(**S,p=.5,clean_weight=.3); cb.load_state_dict(state); fit(rest,cb,start_epoch=2)
    a,b,c=(x.model.state_dict() for x in (whole,rest,half))
    print('resume, full teacher, p .5:', max((a[k].float()-b[k].float()).abs().max().item() for k in a), 'half differs by', max((a[k].float()-c[k].float()).abs().max().item() for k in a))
