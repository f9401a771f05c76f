"""Recurrent networks and bags of words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LstmClassifier(nn.Module):
    """Two layers, both ways, dropout between them; the last step and the last states are read."""

    def __init__(self, width: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, width, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        return self.fc(torch.cat([y[:, -1], h[-1], c[0]], dim=1))


class GruClassifier(nn.Module):
    """The sequence first or second; an initial state that is learned."""

    def __init__(self, batch_first: bool, width: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.gru = nn.GRU(3, width, num_layers=2, batch_first=batch_first, bidirectional=True)
        self.start = nn.Parameter(torch.randn(4, 1, width))
        self.fc, self.batch_first = nn.Linear(2 * width, classes), batch_first

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.repeat(1, x.size(0), 1)
        y, h = self.gru(x if self.batch_first else x.transpose(0, 1), start)
        return self.fc(y.mean(1 if self.batch_first else 0) + torch.cat([h[0], h[1]], dim=1))


class ElmanClassifier(nn.Module):
    """A plain recurrent layer with tanh, and another with ReLU and no bias."""

    def __init__(self, width: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.RNN(3, width, batch_first=True)
        self.second = nn.RNN(width, width, nonlinearity="relu", bias=False, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)[0])[0].amax(dim=1))


class ProjectedLstm(nn.Module):
    """An LSTM whose states are projected to fewer numbers."""

    def __init__(self, width: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3, width, proj_size=3, batch_first=True), nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(dim=1))


class CellLoop(nn.Module):
    """A cell in a loop over the steps, as it is written by hand; a list of the states."""

    def __init__(self, width: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.lstm, self.gru, self.fc = nn.LSTMCell(3, width), nn.GRUCell(width, width), nn.Linear(width, classes)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.width, dtype=x.dtype, device=x.device)
        c, g = torch.zeros_like(h), torch.zeros_like(h)
        states: list[Tensor] = []
        for step in range(x.size(1)):
            h, c = self.lstm(x[:, step], (h, c))
            g = self.gru(h, g)
            states.append(g)
        return self.fc(torch.stack(states, dim=1).logsumexp(1))


class ConvGru(nn.Module):
    """Convolutions over a spectrogram, then a GRU over time: the shape of speech models."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, (2, 1), 1), nn.Hardtanh(0.0, 20.0, inplace=True))
        self.gru, self.fc = nn.GRU(16, width, bidirectional=True), nn.Linear(width, classes)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, channels, high, time = x.size()
        x = x.view(n, channels * high, time).permute(2, 0, 1).contiguous()
        y, _ = self.gru(x)
        y = y.view(y.size(0), y.size(1), 2, -1).sum(2)
        return F.log_softmax(self.fc(y).transpose(0, 1), dim=-1)


class MeanPool(nn.Module):
    """Word ids, embedded and averaged over those that are not padding (id 0)."""

    def __init__(self, width: int = 6, words: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.fc1, self.fc2 = nn.Linear(width, 8), nn.Linear(8, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).to(self.fc1.weight.dtype)
        pooled = (self.embed(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.fc2(F.relu(self.fc1(pooled)))


class TextCnn(nn.Module):
    """Kim 2014: convolutions of several widths over embedded words, each at its maximum over time."""

    def __init__(self, width: int = 6, words: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList([nn.Conv2d(1, 4, (size, width)) for size in (2, 3, 4)])
        self.fc = nn.Linear(12, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(1)
        found: list[Tensor] = []
        for conv in self.convs:
            y = F.relu(conv(x)).squeeze(3)
            found.append(F.max_pool1d(y, y.size(2)).squeeze(2))
        return self.fc(torch.cat(found, 1))


class Bag(nn.Module):
    """torch's own bag of words: a lookup and a mean in one operation."""

    def __init__(self, width: int = 6, words: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(words, width, mode="mean"), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.bag(ids))


class Recommender(nn.Module):
    """Cheng 2016: columns of numbers beside columns of categories, wide and deep."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, 3) for size in (4, 7)])
        self.norm = nn.BatchNorm1d(5)
        self.deep, self.wide = nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 1)), nn.Linear(5, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        numbers = self.norm(numbers)
        columns = [numbers]
        for index, table in enumerate(self.tables):
            columns.append(table(categories[:, index]))
        joined = torch.cat(columns, dim=1)
        return torch.sigmoid(self.deep(joined) + self.wide(numbers)).squeeze(1)
