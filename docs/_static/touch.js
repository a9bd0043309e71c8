// Figures that react to the reader. The data of each, a script of the class `touch`
// (see docs/website.py), follows the still picture that the figure replaces.
(() => {
  const NETWORKS = ['plain', 'SGDrop']

  function h(tag, properties = {}, ...inside) {
    const made = Object.assign(document.createElement(tag), properties)
    made.append(...inside)
    return made
  }

  // What may be in the bar above a figure
  const controls = bar => ({
    note: text => bar.append(h('span', {}, text)),
    select(label, names) {
      const options = names.map((name, value) => h('option', {value}, name))
      const select = h('select', {}, ...options)
      bar.append(h('label', {}, `${label} `, select))
      return () => +select.value
    },
    range(label, max, value) {
      const input = h('input', {type: 'range', min: 0, max, value})
      bar.append(h('label', {className: 'wide'}, `${label} `, input))
      return input
    },
  })

  const photo = (...above) => h('div', {className: 'photo'}, h('img', {alt: ''}), ...above)

  // A table of class probabilities with two columns, and a function that fills it
  function bars(classes, names) {
    const rows = classes.map(name => h('tr', {}, h('th', {}, name), h('td'), h('td')))
    const head = ['probability', ...names].map(name => h('th', {}, name))
    const table = h('table', {}, h('thead', {}, h('tr', {}, ...head)), h('tbody', {}, ...rows))
    const fill = (label, columns) => rows.forEach((row, i) => {
      row.classList.toggle('label', i == label)
      columns.forEach((column, j) => {
        row.cells[j + 1].textContent = `${column[i]} %`
        row.cells[j + 1].style.setProperty('--share', `${column[i]}%`)
      })
    })
    return [table, fill]
  }

  function best(classes, percent) {
    const i = percent.indexOf(Math.max(...percent))
    return `${classes[i]} (${percent[i]} %)`
  }

  // The colours of sgdrop/plots.py, for t from 0 to 1
  const RAMP = [[252, 253, 191], [254, 206, 145], [253, 159, 108], [245, 113, 91],
    [219, 71, 106], [175, 52, 123], [133, 37, 129], [90, 22, 126], [46, 17, 98]]
  function colour(t) {
    const i = Math.min(Math.floor(8 * t), 7)
    const mixed = RAMP[i].map((low, c) => low + (8 * t - i) * (RAMP[i + 1][c] - low))
    return [...mixed, 255 * 0.75 * t ** 0.7]
  }

  // Each figure returns its view, and a function that draws photograph k and describes it
  const figures = {
    rho({classes, rows}, add) {
      const network = add.select('Network', NETWORKS)
      const rho = add.range('ρ', rows[0].masks.length - 1, rows[0].masks.length / 2)
      const holes = Array.from({length: rows[0].order[0].length}, () => h('i'))
      const [table, fill] = bars(classes, ['clean', 'masked'])
      function draw(k) {
        const {order, clean, masks} = rows[network()]
        const {dropped, kept, masked} = masks[rho.value]
        order[k].forEach((at, rank) => { holes[at].hidden = rank >= dropped[k] })
        fill(k, [clean[k], masked[k]])
        rho.ariaValueText = (rho.value / masks.length).toFixed(2)
        return `ρ = ${rho.ariaValueText}: the mask drops ${dropped[k]} of ${order[k].length} `
          + ` positions and keeps ${kept[k]} % of the attribution. `
          + `Clean: ${best(classes, clean[k])}; masked: ${best(classes, masked[k])}.`
      }
      return [[photo(h('div', {className: 'holes'}, ...holes)), table], draw]
    },

    training({rows}, add) {
      const last = rows[0].absent.length - 1
      const epoch = add.range('Epoch', last, last)
      const play = h('button', {type: 'button'}, 'Play')
      epoch.after(play)
      let timer
      function stop() {
        clearInterval(timer)
        timer = null
        play.textContent = 'Play'
        play.ariaPressed = false
      }
      function next() {
        epoch.value++
        epoch.dispatchEvent(new Event('input', {bubbles: true}))
        if (epoch.value == last) stop()
      }
      play.onclick = () => {
        if (timer) return stop()
        if (epoch.value == last) epoch.value = -1
        play.textContent = 'Pause'
        play.ariaPressed = true
        timer = setInterval(next, 250)
      }
      const maps = NETWORKS.map(() => h('canvas', {width: 8, height: 8}))
      const notes = NETWORKS.map(() => h('span'))
      const legend = h('div', {className: 'legend'}, h('i'), h('span'))
      const stops = RAMP.map((_, i) => `rgba(${colour(i / 8).map((v, c) => c < 3 ? v : v / 255)})`)
      legend.firstChild.style.backgroundImage = `linear-gradient(to right, ${stops})`
      const view = NETWORKS.map(
        (name, i) => h('div', {}, photo(maps[i]), h('b', {}, name), notes[i]))
      function draw(k) {
        const levels = rows.flatMap(row => row.maps.flatMap(map => map[k])).sort((a, b) => a - b)
        const top = levels[Math.floor(0.99 * levels.length)]
        const times = (top / 10).toFixed(1)
        legend.lastChild.textContent = `attribution: 0 to ${times} times an even spread`
        rows.forEach((row, i) => {
          const image = new ImageData(8, 8)
          row.maps[epoch.value][k].forEach(
            (level, at) => image.data.set(colour(Math.min(level / top, 1)), 4 * at))
          maps[i].getContext('2d').putImageData(image, 0, 0)
          notes[i].textContent = `accuracy without squares: ${row.absent[epoch.value]} %`
        })
        epoch.ariaValueText = +epoch.value + 1
        return `Epoch ${epoch.ariaValueText} of ${last + 1}.`
      }
      return [[...view, legend], draw]
    },

    cover({classes, rows}, add, redraw) {
      const side = Math.sqrt(rows[0].length), [table, fill] = bars(classes, NETWORKS)
      const cover = h('button', {type: 'button', className: 'cover',
        ariaLabel: 'Cover. Move it with the arrow keys.'})
      add.note('Drag the cover, or move it with the arrow keys.')
      const plain = rows[0].map(place => place[0][0]), worst = plain.indexOf(Math.min(...plain))
      const stage = photo(cover), at = {x: worst % side, y: Math.floor(worst / side)}
      function move(x, y) {
        [at.x, at.y] = [x, y].map(v => Math.max(0, Math.min(side - 1, Math.round(v))))
        redraw()
      }
      const STEPS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
      cover.onkeydown = event => {
        const step = STEPS[event.key]
        if (!step) return
        event.preventDefault()
        move(at.x + step[0], at.y + step[1])
      }
      function follow(event) {  // a cover of 16 pixels, in steps of 4, on 64 pixels
        const {left, top, width} = stage.getBoundingClientRect()
        const place = pixels => (64 * pixels / width - 8) / 4
        move(place(event.clientX - left), place(event.clientY - top))
      }
      stage.onclick = event => { if (event.detail) follow(event) }
      cover.onpointerdown = event => cover.setPointerCapture(event.pointerId)
      cover.onpointermove = event => { if (cover.hasPointerCapture(event.pointerId)) follow(event) }
      function draw(k) {
        cover.style.left = `${at.x / 16 * 100}%`
        cover.style.top = `${at.y / 16 * 100}%`
        const columns = rows.map(row => row[at.y * side + at.x][k])
        fill(k, columns)
        const [plain, sgdrop] = columns.map(column => best(classes, column))
        return `Plain training predicts ${plain}, SGDrop ${sgdrop}.`
      }
      return [[stage, table], draw]
    },
  }

  for (const script of document.querySelectorAll('script.touch')) {
    const data = JSON.parse(script.textContent), {figure} = script.dataset
    const still = script.previousElementSibling.querySelector('a:has(img), img')  // Sphinx links it
    const bar = h('div', {className: 'controls'}), add = controls(bar)
    const shown = data.classes.slice(0, data.photographs.length)
    const photograph = add.select('Photograph', shown)
    const said = h('p')
    const [view, draw] = figures[figure](data, add, redraw)
    const body = h('div', {className: 'view'}, ...view)
    const made = h('div', {className: `touch ${figure}`}, bar, body, said)
    function redraw() {
      const k = photograph()
      for (const image of made.querySelectorAll('img')) image.src = data.photographs[k]
      // a screen reader need not follow what plays by itself
      said.ariaLive = bar.querySelector('[aria-pressed=true]') ? 'off' : 'polite'
      said.textContent = draw(k)
    }
    made.oninput = redraw
    still.replaceWith(made)
    redraw()
  }
})()
